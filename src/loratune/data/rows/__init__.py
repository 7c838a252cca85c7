"""From files and hub data sets to conversations and labelled texts."""
