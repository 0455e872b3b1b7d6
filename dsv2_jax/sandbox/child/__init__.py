"""The locked-up process: `python -I` runs this folder. It imports the standard library and nothing of this project."""
