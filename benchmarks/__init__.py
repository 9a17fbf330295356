"""Claims about speed, each a script that checks the answer before it times it and writes results JSON."""
