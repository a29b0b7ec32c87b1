"""`python -m hybridlab` is the command `hybridlab`."""

from hybridlab.cli import app

app()
