"""The offline demo: from the installed packages' documentation to experts that answer."""
