"""From a recipe and a checkpoint's shape to a policy that fits, before anything is read."""
