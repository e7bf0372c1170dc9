"""What comes into a run and what goes out of it.

load.py             from a recipe file and `--set` to a Recipe, or to everything that is wrong with them
document.py         a YAML file as plain mappings, lists, texts, numbers and booleans
overrides.py        what `--set` changes
schema.py           the recipe as YAML may spell it, and its JSON schema
problems.py         collects what is wrong with a YAML file
recipe.py           Recipe: what the user asked for, checked and complete
references.py       what names a checkpoint
paths.py            paths as people write them
prompts.py          the prompts of a job as token ids: read, or made up
prompt_lines.py     one line of a prompt file, checked by itself
prompt_problems.py  what is wrong with lines, told once for all that share it
tokenizer.py        text to token ids and back
batching.py         which sequences compute in which step
completions.py      the completions of a job: JSON lines in input order, whole or not there
journal.py          those of a job that is not done, which the next run goes on with
identity.py         which job they are of: what completions depend on
answers.py          what they say of the model: exact match and perplexity
"""
