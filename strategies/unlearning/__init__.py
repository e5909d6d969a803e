"""Unlearning without retraining: methods that start from the deployed model and push records down. None guarantees."""
