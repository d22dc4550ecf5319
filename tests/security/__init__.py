"""What an attacker tries, with the rights that an attacker has, and what of it comes to the victim."""
