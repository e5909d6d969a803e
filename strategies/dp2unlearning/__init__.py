"""DP2Unlearning: keep a protected base model; deletion then costs one ordinary fine-tuning of it."""
