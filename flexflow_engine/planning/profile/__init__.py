"""Measures a machine through the engine's own tiers, codecs and kernels.

needs.py        what is to be measured, and what of it a profile lacks
measure.py      measures that, and completes the profile
cache.py        where this machine's profile lies, and how it gets there
sizes.py        how large the measured pieces are, how long they run
bench.py load.py    a processor to time work on; work beside other work
arithmetic.py attention.py codecs.py links.py host.py    the measurements
"""
