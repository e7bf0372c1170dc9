"""Measures a machine through the engine's own tiers, codecs and kernels.

needs.py        what is to be measured, and what of it a profile lacks
measure.py      measures that, and completes the profile
installed.py    what is to be measured when no recipe says what is needed
stored.py       weights that lie on a disk already, to measure it by
cache.py        where this machine's profile lies, and how it gets there
machine.py      which machine this is: whatever makes a measurement an old one
extent.py       how large the measured pieces are, how long they run
bench.py load.py    a processor to time work on; work beside other work
arithmetic.py attention.py codecs.py links.py host.py    the measurements
"""
