"""Machines, their orders, and what each machine is to do."""
