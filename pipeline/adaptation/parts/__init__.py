"""The parts of a recipe: what each attaches to a backbone and trains, a file per part."""
