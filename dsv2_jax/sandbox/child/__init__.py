"""The sandboxed process: `python -I` runs this folder. It imports only the standard library, nothing of the project."""
