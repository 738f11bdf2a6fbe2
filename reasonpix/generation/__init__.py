"""Dataset generation: recipes, stages, the run folder, and the engine that drives them."""
