"""Attribution methods: heat-maps of the image regions that a network's prediction relies on."""
