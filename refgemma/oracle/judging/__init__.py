"""Each tensor of a candidate judged against its bound, and the run as a whole."""
