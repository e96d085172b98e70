"""Many runs: in turn, side by side on this machine, or on a cluster."""
