"""From a Hugging Face checkpoint to a weight store.

source.py      open_checkpoint: a local folder, a hub id, or random weights
checkpoint.py  what every checkpoint can do
config.py      config.json and generation_config.json, and the model plugin that reads them
folders.py     where files come from: a folder on this machine, or the hub and its cache
files.py       which file holds which tensor; a checkpoint that is a set of files
places.py      where in a file a tensor lies, and reading rows of it
prompts.py     a job's prompts, with the tokenizer that the checkpoint has for them
synthetic.py   a checkpoint that is made up
digest.py      what a checkpoint's content is called
plan.py        what an import will write, and everything that stands against it
importing.py   import_checkpoint
room.py        how much of a disk a weight store takes
catalogue.py   the imported stores of a folder
"""
