"""From files and Hub datasets to validated conversations and labelled texts."""
