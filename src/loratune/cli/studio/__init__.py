"""The studio: a local web page over run directories, which starts the commands that a person would type."""
