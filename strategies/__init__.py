"""The methods. Each is found by its entry point in the group ``clkit.strategies``; clkit itself knows none by name."""
