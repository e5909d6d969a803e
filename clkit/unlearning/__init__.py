"""Deletion requests: who asks for what, what was trained without it, and the proof. See docs/unlearning.md."""
