"""From files and Hub datasets to validated conversations and labeled texts."""
