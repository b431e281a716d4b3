"""JupyterLab on the users' node. The token comes from the file that JUPYTER_TOKEN_FILE names."""

c = get_config()  # noqa: F821 - Jupyter defines it

# The port is published by Swarm; requests from other origins are refused, as by default.
c.ServerApp.ip = "0.0.0.0"
c.ServerApp.port = 8888
c.ServerApp.port_retries = 0
c.ServerApp.open_browser = False
c.ServerApp.quit_button = False
# The token is the cluster's secret; a password set by one who has it would outlive it in the home.
c.PasswordIdentityProvider.allow_password_change = False
# What goes between it and its kernels is signed and not hidden: over TCP, everybody on this node could listen.
c.KernelManager.transport = "ipc"
c.FileContentsManager.delete_to_trash = False
c.LabApp.extension_manager = "readonly"
