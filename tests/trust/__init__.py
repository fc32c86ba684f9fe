"""What happens under abuse: `python -m tests.trust` tries thousands of cases, `make test` a few hundred."""
