"""May --bpipe run here? Hook points, arguments, the driver, and the doctor that reports them."""
