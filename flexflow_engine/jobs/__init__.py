"""What comes into a run and what goes out of it: the recipe, prompts, token ids, the steps' rows, completions."""
