r"""The table of contents: one file = one thing that exists; its docstring is what the UI shows.

    sources -> media -> shots -> clips -> latents -+-> latent_stats -+
                                   |               |                 +-> trainset -> pretrain -> probes --+-> report
                                   +-> duplicates -+-----------------+      mask_plan --^   \-> samples --+

Assets are thin: open the project, call the maker in nextvid, report its outcome. They read by path, so there are no IO
managers. Nothing here imports torch; definitions must load in under two seconds.
"""
