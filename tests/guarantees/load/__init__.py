"""Many writers at once, each a process; what they were told, what the database kept of it, and the proof that both agree."""
