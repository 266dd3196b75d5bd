"""What a network costs, as functions of how many units of every group are kept."""
