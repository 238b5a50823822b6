"""Known bugs of Gemma ports, each runnable in the reference."""
