"""What only a GPU can show. ``make test-gpu`` runs it, with the tests of all ops, on a machine that has one."""
