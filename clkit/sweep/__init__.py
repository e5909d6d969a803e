"""Sweeps: one configuration, many runs. ``clkit sweep``; docs/sweeps.md has the options.

``config`` the options, ``axes`` what varies, ``plan`` the runs and all that is wrong with them, ``launchers`` and
``slurm`` how they start, ``worker`` what does one, ``drive`` the loop over them, ``search`` Optuna instead of a grid,
``summary`` the statistics, ``tables`` their formats, ``command`` the command line.
"""
