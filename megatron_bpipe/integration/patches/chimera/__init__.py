"""Chimera: what of Megatron is replaced, and why.

Two pipelines run over the same stages, the second the other way round.  So stage x has two models:
part x of the pipeline that goes down, and part p-1-x of the one that goes up.  For the optimizer
this is data parallelism of twice the size: part x has its copies on stage x (down) and on stage
p-1-x (up).  Whatever is built, fed, stepped or loaded for the upward copy is Megatron's own
function called once more, and sees the pipeline from its other end (`v_placement.mirror`).

=====================================================  =============================================
replaced                                               why
=====================================================  =============================================
parallel_state.get_pipeline_model_parallel_group       gives the upward copy a group that says p-1-x
parallel_state.set_pipeline_model_parallel_rank        called: functions that ask the global rank
parallel_state.get_data_parallel_group                 all copies of a part, while its gradient
                                                       buffers or its samplers are made
parallel_state.initialize_model_parallel               makes those groups; both ends of tied
                                                       embeddings are on one stage (0 and p-1)
training.get_model, (from 0.19)                        called for each copy
models.gpt.unimodal_build_distributed_models
DistributedDataParallel.__init__                       averages over all copies of the part
training.build_train_valid_test_data_iterators         called for each copy: replicas have data of
                                                       their own
training.get_megatron_optimizer                        called for each copy; the upward one counts
                                                       in no norm, since its part does elsewhere
training.save_checkpoint                               saves the downward copy alone
training.load_checkpoint                               called for each copy
finalize_model_grads._allreduce_word_embedding_grads   sums the tied gradients on stages 0 and p-1
=====================================================  =============================================

Losses are made on both ends.  Stage 0's are handed to stage p-1 at the end of each call of the
schedule (`losses.py`), where Megatron looks for them.
"""
