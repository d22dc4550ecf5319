"""Where hostile input enters, what has to become of it, and the judge of what did."""
