"""What method files are made of: formulas, checks, inits and decompositions that are no method by themselves."""
