"""The V placement: what of Megatron is replaced, and why.

Chunk 0 of stage x is part x of the model, chunk 1 is part 2p-1-x: down the stages and back up, so
stage 0 has both ends.  Megatron's interleaving has part p+x instead.  Chunk 1 of stage x under V is
thus exactly what Megatron would give stage p-1-x, and one idea carries everything: whatever is
built, run or saved for chunk 1 sees the pipeline from its other end (`mirror.py`).  Layer numbers,
pre- and post-processing, the keys of checkpoints, layouts and uneven layers then follow from
Megatron's own code.

=====================================================  =============================================
replaced                                               why
=====================================================  =============================================
parallel_state.get_pipeline_model_parallel_group       gives chunk 1 a group that says p-1-x
parallel_state.set_pipeline_model_parallel_rank        called: functions that ask the global rank
parallel_state.is_pipeline_last_stage                  data sets are made outside of any chunk: the
                                                       last part is chunk 1 of stage 0
parallel_state.initialize_model_parallel               both ends of tied embeddings are on stage
                                                       0, so that group is stage 0 alone
training.get_model, (from 0.18)                        the model builder's arguments and context
dist_utils.build_virtual_pipeline_stages
training.get_megatron_optimizer                        gets one weight of both ends (`tied.py`)
chunk 1's ``sharded_state_dict``                       reads layer offsets when it saves and loads
finalize_model_grads._allreduce_word_embedding_grads   sums the tied gradients on stage 0
checkpointing.check_checkpoint_args                    another placement in a format that cannot be
                                                       read across placements
=====================================================  =============================================

Losses are made on stage 0.  They are handed to stage p-1 at the end of each call of the schedule
(`losses.py`), so whatever reports, averages or logs them in Megatron finds them where it looks.
"""
