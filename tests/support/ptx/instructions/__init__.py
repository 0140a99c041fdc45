"""What the machine does at each kind of instruction; importing a module registers its own."""
