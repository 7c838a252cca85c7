"""`loratune adapter`: PEFT folders, whoever made them: read, combined, resized, extracted, merged and compared."""
