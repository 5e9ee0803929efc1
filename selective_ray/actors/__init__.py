"""The Ray half of each noun: where one step of the maths runs, and the stages of a run."""
