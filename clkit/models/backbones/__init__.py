"""Networks that turn inputs into feature vectors; this package imports no torch until one of them is built."""
