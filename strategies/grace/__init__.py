"""GRACE: a codebook of activations and what a layer gives instead, each with the radius in which it answers."""
