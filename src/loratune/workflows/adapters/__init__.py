"""`loratune adapter`: PEFT folders of any origin, read, combined, resized, extracted, merged and compared."""
