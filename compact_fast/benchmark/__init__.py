"""What `compact-fast bench` measures on the machine at hand: the loss, and the step graphs."""
