"""What ``--bpipe-report DIR`` writes, as data: one dataclass a document, written and read here.

Plain Python, so that whoever reads a report (``plan``, ``simulate``, ``compare``) needs no torch.
"""
