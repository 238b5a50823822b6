"""Other engines' files read as traces: names, axes and tokens brought into the reference's form."""
