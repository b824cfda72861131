"""Measuring one stage of the user's model on the hardware at hand, through Megatron's layers.

settings   what to measure, from the command line's words
flags      Megatron's flags, parsed and checked by Megatron's own code
model      what the flags describe: the estimator's Model, and one rank's share of it
group      the process groups of one rank among t, whose partners exist in name only
attention  the core attention that calls torch's SDPA
stage      a middle stage and the output layer, built by Megatron
device     peak, memory and the limit on it
measure    times and bytes of one of them at one micro-batch
bench      all of it in order; each row is handed out as it is found
run        from flags to a profile; Megatron is first imported here
report     the table and the file
"""
