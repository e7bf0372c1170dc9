"""The command line: one file a verb, none of which imports torch before it is called.

app.py        the verbs by name
run.py plan.py profile.py import_.py doctor.py plugins.py store.py schema.py    the verbs
exits.py      exceptions to exit statuses
progress.py   the engine's progress on a terminal, or as plain lines
report.py     metrics and memory tables for people
hardware.py   the machine that a verb plans for
forecast.py   plans and predictions for people and programs
columns.py    a table as aligned text
outputs.py    files that are written at the end of a run
session.py    the registry and the recipe of one call
allocator.py  how the C library hands out memory in this process
"""
