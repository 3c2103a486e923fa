"""Comparison with other programs in one run: the same prompts, links and cores, arms in turns.

An arm is a set of programs: one head on the base station, which answers HTTP requests of OpenAI clients, and workers on
the devices of an emulated network. `arms.py` says which programs an arm runs, `starting.py` and `programs.py` run them,
`asking.py` and `client.py` ask them all in the same way, and `run.py` says in which order. Other projects' programs are
named by the user; nothing of theirs is part of this project.
"""
