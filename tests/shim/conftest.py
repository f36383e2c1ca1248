"""pytest puts the folder of a conftest.py on the path: so the tests in the folders below find `both`, too."""
