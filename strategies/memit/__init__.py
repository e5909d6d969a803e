"""MEMIT-type closed-form edits: the ridge solution that maps each edit's key to the value that answers it."""
