"""What leaves the IR: executions and file formats, imported as ``kdlsq_fx.backends``."""

if __name__ != "kdlsq_fx.backends":
    raise ImportError("import this package as kdlsq_fx.backends; a second copy would split the op table")
